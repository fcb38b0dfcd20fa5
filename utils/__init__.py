"""The library under the scripts, one small module a concern, in the order that data meets them.

errors      the one exception that becomes a line on stderr and an exit code
cli         parser, logging, signals and exit codes of every script
arc         tasks, pairs, grids; reading and writing ARC files
rows        Hugging Face dataset rows -> tasks
prompts     prompt formats: render with grid spans, parse the answer
tokens      token ids, offsets, and the table that says which token holds which cell
config      Hugging Face config.json -> ModelConfig; refuses what it does not know
capture     which layers and hook points are captured, and what they are called
mesh        the (data, model) device mesh and process identity
weights     the table of Hugging Face name, Flax path, axes and sharding; safetensors -> params
model       the Flax decoder, its KV cache, and the captured activations
batching    length buckets, padding, row identity
generate    jitted prefill and decode loop, with capture
scoring     grids -> predictions, submission, accuracy
shards      shard files and the manifest: writing, resuming, safe loading
extract     the run loop that the inference scripts share
"""
