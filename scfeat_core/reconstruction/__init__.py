"""From features to structure: files for hloc and COLMAP, and incremental mapping with pycolmap."""
