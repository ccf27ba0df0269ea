"""Write the samples and the catalogue of a dataset as files that other libraries of recommenders read.

    python jobs/export_samples.py workspace=… [export.folder=…]

Needs a dataset (jobs/prepare_data.py). Leaves these files in export/ of the workspace, or in export.folder:

    samples.parquet       sample_id, user_id, position, split, history, target, timestamp, as jobs/evaluate.py has them
    interactions.parquet  user_id, item_id, weight, datetime, timestamp, split: for RecTools, RePlay and the like
    items.parquet         item_index, item_id, title
    recbole/              RecBole's atomic files: the interactions, the items, and a file of samples for each split

RecBole reads them with dataset=recbole, data_path=…/export, benchmark_filename=[train,valid,test] and, for models of
sequences, alias_of_item_id=[item_id_list]. Recommendations come back with evaluate.recommenders=[file:PATH]: a table of
sample_id (or user_id and position), item_id, and rank or score. The last line on stdout is one JSON object
(`ExportResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.stages.export:export_samples",
        __doc__,
        reads="workspace export",
        on_ray=False,
    )
