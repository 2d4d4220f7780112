# SPDX-License-Identifier: Apache-2.0
# The best that we know at 4 bits: tuned on more images than calibrate, of data sets of their own.
_base_ = ["./sam_tiny_w4a4_yolox_nano_coco.py"]
data_source = (
    "set AHCQ_DATA to a folder with coco_train/, coco_val/ and more_train/{bsds500,penn_fudan,davis17_challenge,"
    "coco_train_extra}/, each with images/ and a COCO instances.json"
)
recipe = dict(
    name="ahcq_plus",
    center_norms=False,  # as it was measured: before tuning they gain nothing
    tune_feature_steps=600,
    tune_feature_units=["image_encoder.*"],
    tune_steps=7200,
    tune_units=["mask_decoder.*"],
    tune_weight_lr=0.015,
)
_photographs = dict(type="CocoDataset", ann_file="instances.json", data_prefix=dict(img="images/"))
_more = "{{$AHCQ_DATA:data}}/more_train"
test_cfg = dict(
    calib=dict(
        tune_images=800,
        # Categories differ, and nothing here looks at them.
        tune_dataset=dict(
            type="ConcatDataset",
            ignore_keys=["classes", "palette"],
            datasets=[
                {{_base_.calib_dataset}},
                dict(**_photographs, data_root=f"{_more}/coco_train_extra"),
                dict(**_photographs, data_root=f"{_more}/bsds500", metainfo=dict(classes=("region",))),
                dict(**_photographs, data_root=f"{_more}/penn_fudan", metainfo=dict(classes=("person",))),
                dict(**_photographs, data_root=f"{_more}/davis17_challenge", metainfo=dict(classes=("object",))),
            ],
        ),
    )
)
