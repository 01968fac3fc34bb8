"""Parameters that numpy cannot look at, as on a GPU: tests of the other files again, with mirrors of the parameters on
the CPU, and where there is a GPU, on it.
"""

# ruff: noqa: F401  (imported tests and fixtures are collected here)

from __future__ import annotations

from collections.abc import Iterator

import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.layers.modules.blob import ParamMemory
from tests.pycaffe.test_net import (
    net,
    path,
    test_backward,
    test_forward_and_views_stay_live,
    test_net_surgery_through_flat,
    test_parameter_gradients_accumulate_and_others_do_not,
    test_reshape_of_an_input,
    test_save_and_load,
    test_share_with,
)
from tests.pycaffe.test_python_layer import (
    importable,
    test_forward_backward_and_reshape,
    test_in_place,
    test_learnable_blob,
    test_solver_trains_user_blobs,
)
from tests.pycaffe.test_solver import (
    folder,
    test_apply_update,
    test_callbacks,
    test_callbacks_of_the_training_net,
    test_gradient_arrays_stay_live_over_steps,
    test_gradients_of_blobs_after_step,
    test_input_blobs_feed_the_steps,
    test_share_weights,
    test_snapshot_and_restore,
)


@pytest.fixture(autouse=True, params=["mirror", pytest.param("gpu", marks=pytest.mark.gpu)])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "gpu":
        caffe.set_mode_gpu()
    else:
        monkeypatch.setattr(ParamMemory, "_visible", staticmethod(lambda tensor: False))
    yield
    caffe.set_mode_cpu()
