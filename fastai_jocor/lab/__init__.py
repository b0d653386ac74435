"For experiments: data sets, runs, grids, reports, command lines"
