"""The walk: from a plan of the merge tree to the tokens that it keeps."""
