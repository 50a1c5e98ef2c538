"""WHERE it runs: the controller, Ray placement, the run folder, the live view, the command line.

In: a resolved config. Out: a run folder (metrics, events, checkpoints), and what the terminal shows.

    command line -> controller --SampleRequests--> engines (rollout) --Trajectories--> scorer --Groups--> learner ranks
                        ^                                                                                    |
                        +--------- metrics, events, checkpoints -------- weights pushed to the engines <-----+
"""
