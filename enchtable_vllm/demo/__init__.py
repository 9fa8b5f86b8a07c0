"""The whole pipeline on a real small model, in minutes, on two CPU cores.

Train the three checkpoints that the story needs, build the safety vector, plan, serve with
``vllm serve --load-format enchtable``, and ask the unmerged and the merged model the same
questions.
"""
