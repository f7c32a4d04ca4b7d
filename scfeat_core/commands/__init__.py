"""Small sub-commands of ``scfeat`` that have no room of their own."""
