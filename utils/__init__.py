"""The library under the scripts; a module imports only from those above it.

errors      the one exception that becomes a line on stderr and an exit code
cli         parser, logging, signals and exit codes of every script
disk        whether a folder can be written, and how much room it has
jsonfile    a JSON file written item by item that appears when it is whole
arc         tasks, pairs, grids; reading and writing ARC files
rows        Hugging Face dataset rows -> tasks
augment     views of a task: its symmetries, colors and orders of pairs; and back
encodings   a grid as text, with the span of every cell, and back
templates   chat templates and Jinja files, filled with placeholders for grids
prompts     prompt formats: render with cell spans, parse the answer
items       what an item of a shard is, its exact bytes, and safe unpickling
gcs_errors  what can go wrong on the way to a bucket, in words
cloud       a folder of a bucket: reading, and one file to one object, exactly once
places      where a run lies: a folder of a disk or of a bucket
tokens      token ids, offsets, and the table that says which token holds which cell
rope        the rotary embedding's configuration
config      Hugging Face config.json -> ModelConfig; refuses what it does not know
capture     which layers and hook points are captured, and what they are called
request     what a run is asked to do: every flag's default, once
fetch       models and datasets of a bucket, as verified local files
flags       the flags that the inference scripts share
supervise   a process that waits outside, and puts JAX's aborts into words
processes   the processes of one run: agreeing, noticing who is gone, stopping together
mesh        the (data, model) device mesh; the compilation cache
layout      where the arrays of a forward pass live on the mesh
attention   rotary embedding and grouped-query attention, over prompts and over a cache
model       the Flax decoder, its KV cache, and the captured activations
weights     the table of Hugging Face name, Flax path, axes and sharding; safetensors -> params
memory      what a forward pass takes on a device; which mesh and how many rows fit
batching    length buckets, padding, row identity
generate    jitted prefill and decode loop, with capture
scoring     grids -> predictions, submission, accuracy
manifest    metadata.json and the journal of answers: reading, merging, comparing
shards      reading shards of a folder or a bucket, with verification
writer      filling, closing and committing shards; resuming
stats       mean, deviation and norms of what a run captured, kept beside its manifest
shuffle     rows on their way into batches: in order, or mixed in a buffer
dataset     stored activations as training data: selected, shuffled, in batches
bridges     the same for torch, SAELens and dictionary_learning
contrast    what differs between solved and failed tasks, by layer and role
merge       the folders of separate hosts' runs, as one (python -m utils.shards merge)
prepare     a request, checked: samples, prompts and batches, before a model loads
compute     batches through the engine, and what comes back as items
pipeline    launch, fetch and store batches, each in a thread
storage     what a run will store, and whether there is room
remote      what a bucket holds of a run before it begins
uploads     shards on their way to a bucket, while the model computes
finish      how a run ends: one output, one manifest, and all of it in the bucket
extract     the run loop that the inference scripts share
report      what a run prints: the plan of a dry run, the summary at the end
plan        the run compiled ahead of time for a TPU slice
"""
