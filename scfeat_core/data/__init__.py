"""Training data: photographs, warps of photographs, posed images."""
