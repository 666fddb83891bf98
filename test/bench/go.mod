module lkjwt/bench

go 1.19
