"""Reading of images, crops, and images on one sheet."""
