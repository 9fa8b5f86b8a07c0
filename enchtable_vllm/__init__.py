"""Give fine-tuned models their safety alignment back, while vLLM loads them.

EnchTable (arXiv 2511.09880): distil a *safety vector* once per base model, then add it to any
fine-tune of that base, scaled and attenuated matrix by matrix where it would interfere with the
task. The packages below follow the data, and depend on each other in this order only:

* `checkpoint`: read, fingerprint and write checkpoints, tensor by tensor;
* `vector`: safety vectors, verified on the bytes that are used;
* `plan`: how much of the vector each matrix can take, in a small reviewable file;
* `merge`: the one stream in which a vector meets weights, and the offline merge;
* `serving`: vLLM's load format ``enchtable``, around that same stream;
* `cli`: the command ``enchtable``; `demo`: all of it on a real small model.

Every error raised on purpose is an `errors.EnchTableError`.
"""
