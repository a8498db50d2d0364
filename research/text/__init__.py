"""From texts to tokens: tokenizing, caching, packing, buckets of lengths."""
