// Package dht is the directory of a unicast layer: a Kademlia distributed hash
// table that maps the hash of a name to the addresses of the members where the
// name is registered. It speaks the protocol of spec 43.
//
// Where the reference takes short cuts (one-hop lookups, unsorted contact
// lists, publishing to alpha contacts once a day) this implementation does what
// Kademlia says: iterative lookups over ids sorted by distance, values stored
// at the k closest members, republished every replication period and whenever
// a closer member appears. Nothing of that is visible as another message
// format, so both kinds of member share a layer.
//
// A Node is a state machine. It starts no goroutine, reads no clock and opens
// no socket: the owner passes the time, received messages and route changes
// in, and takes messages to send, answered queries and the next deadline out.
// The same inputs give the same outputs. A Node is not safe for concurrent use.
//
// The time passed in serves two purposes: differences between two calls are
// durations (a time.Time from time.Now carries a monotonic reading for that),
// and its wall-clock reading is what absolute expiry times on the wire are
// made from and compared with.
package dht
