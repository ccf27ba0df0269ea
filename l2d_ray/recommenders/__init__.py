"""One file a recommender, all under one contract."""
