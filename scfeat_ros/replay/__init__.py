"""``scfeat replay``: recorded images through the pipeline of the node, offline or on the live graph."""
