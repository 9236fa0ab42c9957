"""unimod"""
