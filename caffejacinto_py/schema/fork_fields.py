"""Fields by which a net or solver shows the fork it was written for.

Only fields that BVLC Caffe does not have: message -> fields. Where a fork's descendants have a field too, it stands
under the ancestor. proto/caffe.proto names the forks of every field.
"""

from __future__ import annotations

FORK_FIELDS: dict[str, dict[str, str]] = {
    "jacinto-0.16": {
        "LayerParameter": "snapshot_log_weights snapshot_log_in snapshot_log_out",
        "NetQuantizationParameter": "insert_quantization_param power2_range",
        "QuantizationParameter": "power2_range",
        "QParams": "scale",
        "SolverParameter": "local_lr_auto local_gw_ratio",
        "TransformationParameter": "var_sz_img_enabled",
    },
    "jacinto": {
        "LayerParameter": "image_label_data_param",
        "LossParameter": "label_weights",
        "NetParameter": "quantize net_quantization_param",
        "QuantizationParameter": "power2_scale_weights power2_scale_activations quantized_infer_count "
        "qparam_in qparam_w qparam_out",
        "SolverParameter": "ignore_shape_mismatch snapshot_log display_sparsity sparse_mode sparsity_target "
        "sparsity_step_factor sparsity_step_iter sparsity_start_iter sparsity_start_factor sparsity_threshold_maxratio "
        "sparsity_itr_increment_bfr_applying sparsity_threshold_value_max",
    },
    "adaption": {
        "DropoutParameter": "scale_train",
        "LayerParameter": "lpfp_param roi_pooling_param smooth_l1_loss_param lp_convolution_param lp_act_param "
        "lp_inner_product_param",
        "SolverParameter": "estimate",
    },
    "ristretto": {
        "QuantizationParameter": "bw_layer_in bw_layer_out bw_params fl_layer_in fl_layer_out fl_params mant_bits "
        "exp_bits exp_min exp_max",
    },
    "nvcaffe": {
        "BatchNormParameter": "scale_filler bias_filler scale_bias engine",
        "ConvolutionParameter": "cudnn_convolution_algo_seeker conv_algos_override",
        "DataParameter": "threads parser_threads cache shuffle precache",
        "DropoutParameter": "engine random_seed",
        "ELUParameter": "lambda",
        "ImageDataParameter": "short_side threads cache precache dataset_share_per_node",
        "LayerParameter": "forward_type backward_type forward_math backward_math debug cudnn_math_override trt_param "
        "detectnet_groundtruth_param detectnet_augmentation_param",
        "LossParameter": "label_smoothing",
        "MultiBoxLossParameter": "ignore_difficult_gt",
        "NetParameter": "default_forward_type default_backward_type default_forward_math default_backward_math "
        "global_grad_scale global_grad_scale_adaptive default_conv_algos_override reduce_buckets "
        "default_cudnn_math_override eltwise_mem_sharing",
        "PoolingParameter": "torch_pooling",
        "SolverParameter": "rampup_interval rampup_lr min_lr solver_data_type store_blobs_in_old_format "
        "momentum_policy max_momentum momentum_power larc larc_policy larc_eta weight_decay_policy weight_decay_power "
        "test_and_snapshot_last_epochs larc_turbo max_weight_decay",
        "TransformationParameter": "use_gpu_transform random_seed img_rand_resize_lower img_rand_resize_upper "
        "rand_resize_ratio_lower rand_resize_ratio_upper vertical_stretch_lower vertical_stretch_upper "
        "horizontal_stretch_lower horizontal_stretch_upper interpolation_algo_down interpolation_algo_up allow_upscale "
        "display forward_packing num_labels",
    },
    "ssd": {
        "LayerParameter": "annotated_data_param multibox_loss_param permute_param prior_box_param "
        "detection_output_param detection_evaluate_param norm_param video_data_param",
        "SolverParameter": "eval_type ap_version plateau_winsize show_per_class_result",
        "TransformationParameter": "resize_param noise_param emit_constraint crop_h crop_w distort_param expand_param",
    },
}

# (message, field) -> position of the fork in FORK_FIELDS: the first fork wins
_RANK = {
    (message, field): rank
    for rank, messages in enumerate(FORK_FIELDS.values())
    for message, fields in messages.items()
    for field in fields.split()
}
_OPAQUE = {"BlobProto", "FillerParameter", "NetStateRule", "ParamSpec"}  # every fork has all their fields


def find_fork(message: object) -> tuple[str, str] | None:
    """The fork that alone (with its descendants) has a field set in `message`, and the path of that field."""
    best: tuple[int, str] | None = None
    todo: list[tuple[object, str]] = [(message, "")]
    while todo:
        here, path = todo.pop()
        name = here.DESCRIPTOR.name  # type: ignore[attr-defined]
        for spec, value in here.ListFields():  # type: ignore[attr-defined]
            below = path + spec.name
            rank = _RANK.get((name, spec.name))
            if rank is not None and (best is None or rank <= best[0]):
                best = (rank, below)
            inner = spec.message_type
            if inner is None or inner.name in _OPAQUE:
                continue
            if hasattr(value, "ListFields"):
                todo.append((value, below + "."))
            else:
                todo += [(item, f"{below}[{i}].") for i, item in enumerate(value)]
    if best is None:
        return None
    return list(FORK_FIELDS)[best[0]], best[1]
