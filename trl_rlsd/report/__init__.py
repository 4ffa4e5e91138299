"""What a run looks like to people: credit token by token, and curves.

picture    one completion with its tokens' gain, weight and credit, as plain data
page       such pictures as one HTML page that needs no network
terminal   the same in a terminal
logs       what runs left on disk
curves     their plots
run        the curves of one run or several, as one HTML page
"""
