# SPDX-License-Identifier: Apache-2.0
# COCO 2017 where mmdet's configs look for it: data/coco/{annotations,train2017,val2017}.
data_source = "COCO 2017 from https://cocodataset.org/#download belongs into data/coco/{annotations,train2017,val2017}"
