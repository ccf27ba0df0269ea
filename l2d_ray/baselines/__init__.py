"""What L2D is compared with, one recommender a file: sanity floors, and language-space decoding, the thing to beat."""
