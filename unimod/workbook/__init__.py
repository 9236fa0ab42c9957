"""The workbook: runs notebooks, keeps their results in run folders, writes the report, checks exercises."""
