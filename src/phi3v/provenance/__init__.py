"""What a result came from: manifests, the chain behind a number, and digests that must repeat."""
