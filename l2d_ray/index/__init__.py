"""The index on disk: everything that search needs of one snapshot of a memory, shard by shard, in one space.

    index/<snapshot>/moments/<share>/shard=<k>.npz   sums, counts, second moments: what spaces are fitted on
    index/<snapshot>/<label>/space-*.npz             the linear map
    index/<snapshot>/<label>/trained-*.faiss         an index trained on a sample of all shards, or just empty
    index/<snapshot>/<label>/fitted.json             written when space and training are complete
    index/<snapshot>/<label>/shard=<k>/*/*           mapped rows, item means and the FAISS index of the shard
    index/<snapshot>/<label>/shard=<k>.json          written when the shard is complete
    index/<snapshot>/<label>/index-<recall>.json     written last: complete, and tuned to this recall

`snapshot` is a number and the beginning of a digest. `label` says the space, the FAISS factory and the share of the
samples, so that several indexes of one snapshot live side by side.
"""
