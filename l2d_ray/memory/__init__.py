"""The memory on disk: hidden states in Parquet, committed unit by unit, listed by immutable snapshots.

    memory/data/<unit>/shard=<k>/<attempt>.parquet      rows of the items that hash to shard k
    memory/quarantine/<unit>/<attempt>.parquet          samples that gave no row, and why
    memory/units/<unit>.json                            written last: the unit's files, checksums and counts
    memory/snapshots/<n>.json                           the units that make snapshot n

It is readable with plain pyarrow; a snapshot's units name the files. `python -m l2d_ray.memory verify WORKSPACE`
checks every checksum and count.
"""
