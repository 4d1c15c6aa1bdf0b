/*
 * Quality of service of a flow: what a program asks for, and the predefined
 * specifications (spec 33 section 5, 34).
 */
#ifndef OUROBOROS_QOS_H
#define OUROBOROS_QOS_H

#include <stdbool.h> /* programs rely on it */
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Peer time-out of the predefined specifications, in ms. */
#define DEFAULT_PEER_TIMEOUT 120000

typedef struct qos_spec {
        uint32_t delay;        /* ms */
        uint64_t bandwidth;    /* bit/s */
        uint8_t  availability; /* number of nines */
        uint32_t loss;         /* 0: nothing may be lost (with in_order) */
        uint32_t ber;          /* errors per 10^9 bits; 0: checksum */
        uint8_t  in_order;     /* not 0: in order, without duplicates */
        uint32_t max_gap;      /* ms */
        uint32_t timeout;      /* ms until the peer counts as gone; 0: never */
} qosspec_t;

static const qosspec_t qos_raw = {
        UINT32_MAX, 0, 0, 1, 1, 0, UINT32_MAX, DEFAULT_PEER_TIMEOUT
};

static const qosspec_t qos_raw_no_errors = {
        UINT32_MAX, 0, 0, 1, 0, 0, UINT32_MAX, DEFAULT_PEER_TIMEOUT
};

static const qosspec_t qos_best_effort = {
        UINT32_MAX, 0, 0, 1, 0, 1, UINT32_MAX, DEFAULT_PEER_TIMEOUT
};

static const qosspec_t qos_video = {
        100, UINT64_MAX, 3, 1, 0, 1, 100, DEFAULT_PEER_TIMEOUT
};

static const qosspec_t qos_voice = {
        50, 100000, 5, 1, 0, 1, 50, DEFAULT_PEER_TIMEOUT
};

static const qosspec_t qos_data = {
        1000, 0, 0, 0, 0, 1, 2000, DEFAULT_PEER_TIMEOUT
};

#ifdef __cplusplus
}
#endif

#endif /* OUROBOROS_QOS_H */
