"""`homer serve`: a model behind HTTP, with the documents that it has read (the extra `serve`)."""
