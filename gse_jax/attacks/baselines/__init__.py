"""The attacks GSE is compared with, one file per paper, written from the papers."""
