"""The embedded pipeline, its adapters and its data set: loaders only, the files beside them."""
