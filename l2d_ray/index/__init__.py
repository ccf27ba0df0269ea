"""The index of one snapshot of a memory: files, search and aggregations. All shards are in one space.

    index/<snapshot>/moments/<share>/shard=<k>.npz   item sums, counts and second moments, to fit spaces on
    index/<snapshot>/<label>/space-*.npz             the linear map
    index/<snapshot>/<label>/means-*.npz             the estimate of items from their means
    index/<snapshot>/<label>/moments-*.npz           the moments that the map was fitted to
    index/<snapshot>/<label>/trained-*.faiss         an empty index, trained on a sample of all shards if needed
    index/<snapshot>/<label>/fitted.json             written when space and training are complete
    index/<snapshot>/<label>/shard=<k>/*/*           mapped rows, item means and the FAISS index of new rows
    index/<snapshot>/<label>/shard=<k>.json          written when the shard is complete
    index/<snapshot>/<label>/index-<recall>.json     written last: complete, and tuned to this recall
    index/<snapshot>/transitions/shard=<k>.npz       pairs of items, and in .json the record of this file
    index/<snapshot>/means/<label>/shard=<k>-*.npy   item means of `posterior`, to which titles contribute
    index/<snapshot>/<label>/posterior.json          written after the index: parameters of `posterior`

`snapshot` is a number and the beginning of a digest. `label` names the space, the factory string and the share of the
rows. So several indexes of one snapshot exist side by side.

The records of an index name its files, some of which may be in the folders of older snapshots: the map, and segments of
rows that are in both. jobs/compact.py leaves them there while a kept index names them.
"""
