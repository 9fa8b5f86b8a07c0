"""Exchange the safety vector of a running server: exactly, on every rank, or not at all.

`staging` merges old and new tensors in host memory while serving goes on; `rank` is what each
rank does when it is told to; `transaction` tells them, from the API server.
"""
