"""A mixture of experts as a GGUF file, which llama.cpp runs."""
