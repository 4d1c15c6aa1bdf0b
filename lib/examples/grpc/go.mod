module github.com/o7s/o7s-router/lib/examples/grpc

go 1.26.0

// The library of this very tree: the example is tested with it.
replace github.com/o7s/o7s-router => ../../..

require (
	github.com/o7s/o7s-router v0.0.0-00010101000000-000000000000
	google.golang.org/grpc v1.85.0
	google.golang.org/protobuf v1.36.12
)

require (
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
	golang.org/x/text v0.43.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260817212433-ac3dfec99bb1 // indirect
)
