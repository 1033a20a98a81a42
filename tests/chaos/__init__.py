"""The harness of promises.md 3: a world that is killed at random, and what checks that nobody was lost or repeated.

sink: the other side of SMTP, by script, with a record written before every reply. proxy: faults between two sockets.
"""
