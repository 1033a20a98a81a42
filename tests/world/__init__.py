"""The world around the product, for tests: servers of our own making, clocks, zones, peers.

Whatever a test starts here it also stops; folders are temporary and short (a unix socket's path has 104 bytes).
"""
