"""The routing of any mixture of experts: look into it, and change it for the time of a block.

It works on what routers hand out, ``(logits, weights, index)``: those of upcycle and those of the
native architectures of transformers do it alike.
"""
