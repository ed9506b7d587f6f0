"""The bytes of files: local disks, HTTP servers and buckets, with retries, read-ahead and a cache on the node."""
