"""The origin of results: manifests, the chain behind a number, and digests that must repeat."""
