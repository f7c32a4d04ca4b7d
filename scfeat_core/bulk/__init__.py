"""Features of many images: found, decoded ahead, extracted in batches, and written so that a run can be resumed."""
