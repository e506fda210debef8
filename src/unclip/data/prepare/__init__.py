"""Build data sets: import images with captions, download COCO, resume interrupted builds."""
