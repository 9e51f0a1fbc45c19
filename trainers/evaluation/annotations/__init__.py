"""Pictures with a label for each pixel or object, read from index masks, COCO and Pascal VOC."""
