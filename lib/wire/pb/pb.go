// Package pb holds the protobuf messages of the control plane as generated
// code. Only package wire uses it; everyone else uses the structs of wire.
package pb

//go:generate sh -c "protoc --plugin=protoc-gen-go=$(go tool -n protoc-gen-go) --go_out=. --go_opt=paths=source_relative cep.proto dht.proto enroll.proto ipcp_config.proto"
