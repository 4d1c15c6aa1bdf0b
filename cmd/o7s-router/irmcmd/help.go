package irmcmd

const helpTop = `Usage: irm OPERATION ...

  ipcp    create, destroy, bootstrap, enroll, connect, disconnect, list
  bind    say which program, process or ipcp serves a name
  unbind  the inverse
  name    create, destroy, register, unregister, list
  help    this text

Words may be abbreviated to any prefix. "irm OPERATION help" tells more.
`

const helpIPCP = `Usage: irm ipcp OPERATION ...

  create name <ipcp> type {unicast|broadcast|udp4|udp6|eth-dix|eth-llc|local}
  destroy name <ipcp>
  bootstrap name <ipcp> layer <layer> [type TYPE] [option value]...
  enroll name <ipcp> [type {unicast|broadcast}] [layer <layer>] [dst <name>] [autobind]
  connect name <ipcp> dst <name> [component {dt|mgmt|*}] [qos {raw|best|video|voice|data}]
  disconnect name <ipcp> dst <name> [component {dt|mgmt|*}]
  list

Options of bootstrap:
  local             hash
  eth-llc           dev, hash
  eth-dix           dev, hash, ethertype (hexadecimal, default A000)
  udp4, udp6        ip, port (3435), dns
  broadcast         autobind
  unicast           autobind, hash {SHA3_224|SHA3_256|SHA3_384|SHA3_512},
                    addr (4), eid (8), ttl (60), addr_auth {flat},
                    routing {link_state|lfa|ecmp}, ls_t_recalc (4 s),
                    ls_t_update (15 s), ls_t_timeo (60 s),
                    congestion {mb-ecn|none}, directory {DHT}, dht_alpha (3),
                    dht_k (8), dht_t_expire (86400 s), dht_t_refresh (900 s),
                    dht_t_replicate (900 s)
`

const helpBind = `Usage: irm bind OPERATION ...

  program <program> name <name> [auto] [-- <arguments>]
  process <pid> name <name>
  ipcp <ipcp> name <name>

With auto the program is started when a flow arrives and nobody accepts it.
`

const helpUnbind = `Usage: irm unbind OPERATION ...

  program <program> name <name>
  process <pid> name <name>
  ipcp <ipcp> name <name>
`

const helpName = `Usage: irm name OPERATION ...

  create <name> [lb {round-robin|spillover}]
         [{sencpath|scrtpath|skeypath|cencpath|ccrtpath|ckeypath} <file>]...
  destroy <name>
  register <name> {ipcp <ipcp>|layer <layer>}...
  unregister <name> {ipcp <ipcp>|layer <layer>}...
  list [list <prefix>]

In ipcp and layer a * stands for any run of characters.
`
