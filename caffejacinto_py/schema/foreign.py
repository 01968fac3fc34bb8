"""Fields that no fork of ours has but users bring from others: who owns them, and what to write instead."""

from __future__ import annotations

# message -> field -> hint
FOREIGN: dict[str, dict[str, str]] = {
    "PoolingParameter": {
        "ceil_mode": "'ceil_mode' is from Intel Caffe and PSPNet; write 'round_mode: FLOOR' for false",
    },
    "BatchNormParameter": {
        "slope_filler": "'slope_filler' is from PSPNet; write 'scale_bias: true' and 'scale_filler'",
        "momentum": "write 'moving_average_fraction'",
        "frozen": "'frozen' is from PSPNet; write 'use_global_stats: true'",
    },
    "InnerProductParameter": {
        "normalize": "'normalize' is from SphereFace and its relatives",
    },
    "ConvolutionParameter": {
        "filler_weight": "write 'weight_filler'",
        "kernel_dilation": "write 'dilation'",
    },
    "LayerParameter": {
        "bn_param": "'bn_param' is from SegNet and PSPNet; write BatchNorm with 'batch_norm_param'",
        "interp_param": "'interp_param' is from DeepLab",
        "upsample_param": "'upsample_param' is from SegNet; Deconvolution can upsample",
        "dense_image_data_param": "'dense_image_data_param' is from SegNet; see 'image_label_data_param'",
        "shuffle_channel_param": "'shuffle_channel_param' is from ShuffleNet",
        "relu6_param": "'relu6_param' is no field of ours; Clip with min 0 and max 6 does the same",
        "focal_loss_param": "'focal_loss_param' is from forks for RetinaNet",
        "center_loss_param": "'center_loss_param' is from caffe-face",
        "proposal_param": "'proposal_param' is from py-faster-rcnn forks",
        "psroi_pooling_param": "'psroi_pooling_param' is from R-FCN",
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
