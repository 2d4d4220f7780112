# SPDX-License-Identifier: Apache-2.0
# Some COCO images: <AHCQ_DATA>/coco_train to calibrate, <AHCQ_DATA>/coco_val to evaluate.
data_source = "set AHCQ_DATA to a folder with coco_train/ and coco_val/, each with images/ and a COCO instances.json"
eval_dataset = dict(
    type="CocoDataset",
    data_root="{{$AHCQ_DATA:data}}/coco_val",
    ann_file="instances.json",
    data_prefix=dict(img="images/"),
)
calib_dataset = dict(
    type="CocoDataset",
    data_root="{{$AHCQ_DATA:data}}/coco_train",
    ann_file="instances.json",
    data_prefix=dict(img="images/"),
)
