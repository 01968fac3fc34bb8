"""Fields that no fork of ours has but users bring from others: who owns them, and what to write instead."""

from __future__ import annotations

# message -> field -> hint
FOREIGN: dict[str, dict[str, str]] = {
    "PoolingParameter": {
        "rounding": "write 'round_mode: FLOOR' or 'round_mode: CEIL'",
    },
    "BatchNormParameter": {
        "slope_filler": "'slope_filler' is from PSPNet; write 'scale_bias: true' and 'scale_filler'",
        "momentum": "write 'moving_average_fraction'",
        "frozen": "'frozen' is from PSPNet; write 'use_global_stats: true'",
    },
    "ConvolutionParameter": {
        "filler_weight": "write 'weight_filler'",
        "kernel_dilation": "write 'dilation'",
    },
    "LayerParameter": {
        "dense_image_data_param": "'dense_image_data_param' is from SegNet; see 'image_label_data_param'",
        "focal_loss_param": "'focal_loss_param' is from forks for RetinaNet",
        "proposal_param": "'proposal_param' is from py-faster-rcnn forks",
        "region_loss_param": "'region_loss_param' is from caffe-yolo",
        "augmentation_param": "'augmentation_param' is from FlowNet",
        "inq_param": "'inq_param' is from INQ",
    },
    "NetParameter": {
        "item": "this looks like a label map, not a net",
        "model": "this looks like no Caffe net",
        "engine": "'engine' for the whole net is from Intel Caffe; remove it",
        "bn_stats_batch_size": "'bn_stats_batch_size' is from Intel Caffe; remove it",
    },
    "TransformationParameter": {
        "resize_width": "write 'resize_param { width: ... height: ... }'",
        "new_height": "write 'resize_param { height: ... width: ... }'",
    },
}
