"""The SCFeat network: F2R backbone, shared coupling-bridge normalization, detection network."""
