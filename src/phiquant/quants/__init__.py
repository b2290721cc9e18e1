"""quants"""
