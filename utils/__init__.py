"""The library under the scripts: eight rooms, through which data flows one way.

    dataset row -> Task -> Sample -> Encoded (ids + cell table) -> Batch -> decoder (captures what
      was asked for) -> Result -> Item -> shard file -> manifest -> bucket -> ActivationRows -> SAE

errors   the one exception that becomes a line on stderr and an exit code
cli      parser, logging, signals and exit codes of every script
store    bytes under a name, on a disk or in a bucket: whole, or not there
arc      tasks in (files, dataset rows), views, scores and predictions out
model    token ids -> hidden states, on a mesh
prompt   a task as tokens, with the span of every cell, and back
shards   items in files, each sample once
plan     a request, checked, before a model loads
dataset  shards -> batches of rows
run      a plan computed: predictions, shards and a manifest

A room imports from those above it only: errors, cli, store | arc, model | prompt, shards |
plan, dataset | run | scripts.
"""
