"""``sla-data``: from any text to Megatron's indexed format.

inputs.py      the flags that say where text is, and the sources they mean
blocks.py      a source cut into blocks that do not depend on who works on them
documents.py   a block's documents and faults
encoding.py    documents to token ids, those of Megatron's tokenizer; plain_tokenizers.py without Megatron
shards.py      one block's result on disk
workers.py     processes that turn blocks into shards
workdir.py     what is done already: lock, settings, shards
job.py         what is to be made, and what it depends on
tokenizing.py  the whole job: resume, run
assembling.py  shards to the final files: split, duplicates, faults
merging.py     how the files are written; index_format.py is what they begin with
joining.py     finished data sets to one

dealing.py     text dealt out to tasks
division.py    a job divided among tasks: the plan, a task
gathering.py   what the tasks have done to the final files, or a report of what is in the way
slurm.py       the tasks as a job array; submitting.py is the command

training_tokenizer.py   a sentencepiece model of a sample of the documents
inspection.py           whether an index and its data agree; contents.py what is in them
*_command.py            each command's flags, and what it prints
"""
