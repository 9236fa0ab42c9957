"""The workbook: runs notebooks, keeps what they find in run folders, writes the report, checks exercises and the installation."""
