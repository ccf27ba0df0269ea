"""The memory on disk: hidden states in Parquet, committed unit by unit, listed by immutable snapshots.

    memory/data/<unit>/shard=<k>/<attempt>.parquet      rows of the items that hash to shard k
    memory/quarantine/<unit>/<attempt>.parquet          samples without a row, each with the reason
    memory/units/<unit>.json                            written last: the unit's files, checksums and counts
    memory/deletions/<unit>/*.parquet                   places of erased rows, which later snapshots leave out
    memory/snapshots/<n>.json                           the units of snapshot n, and what was erased from them
    memory/items/<dataset>.parquet                      the items of a dataset
    memory/removals/*.json                              files that a compaction is about to remove

Plain pyarrow can read it: a snapshot lists its units and what was erased from them, and a unit's record lists its
files. The command `python -m l2d_ray.memory verify WORKSPACE` checks every checksum and count.
"""
