"""Network of the cluster on AWS: its subnets are checked, its security group is created."""

from collections.abc import Iterable, Sequence
from typing import Any

from carclass.errors import UserError

ENDPOINTS = ("ec2", "ssm", "ssmmessages")
"""Services that nodes need besides S3; those with images on ECR need two more."""
ECR_ENDPOINTS = ("ecr.api", "ecr.dkr")
Values = dict[str, Any]


def check_subnets(ec2: Any, subnets: Sequence[str], services: Iterable[str], types: Iterable[str]) -> tuple[str, str]:
    """Return the VPC of private subnets, and advice ("" without any).

    services: of AWS that nodes must reach. types: of instances, each of which one of the zones must offer. Raise
    UserError for subnets from which nodes would not reach AWS, or that would give them public addresses.
    """
    described = ec2.describe_subnets(SubnetIds=list(subnets))["Subnets"]
    for each in described:
        if each["MapPublicIpOnLaunch"]:
            raise UserError(f"--subnet: {each['SubnetId']} assigns public IP addresses. Give a private subnet.")
    vpcs = sorted({each["VpcId"] for each in described})
    if len(vpcs) > 1:
        raise UserError(f"--subnet: the subnets are of several VPCs ({', '.join(vpcs)}). Give subnets of one.")
    _check_zones(ec2, sorted({each["AvailabilityZone"] for each in described}), types)
    advice = [_check_routes(ec2, vpcs[0], subnet, services) for subnet in subnets]
    return vpcs[0], next(filter(None, advice), "")


def _check_zones(ec2: Any, zones: Sequence[str], types: Iterable[str]) -> None:
    """Raise UserError for an instance type that none of the zones offers."""
    for kind in sorted(set(types)):
        filters = [{"Name": "instance-type", "Values": [kind]}, {"Name": "location", "Values": list(zones)}]
        offers = ec2.describe_instance_type_offerings(LocationType="availability-zone", Filters=filters)
        if not offers["InstanceTypeOfferings"]:
            raise UserError(
                f"--subnet: {', '.join(zones)} offer(s) no {kind}. Add a subnet in another zone of the VPC, or choose "
                "another type in cluster/aws.yaml."
            )


def _check_routes(ec2: Any, vpc: str, subnet: str, services: Iterable[str]) -> str:
    """Return advice on a subnet's routes. Raise UserError if nodes would not reach AWS through them."""
    table = _route_table(ec2, vpc, subnet)
    endpoints = _endpoints(ec2, vpc, table["RouteTableId"])
    defaults = [route for route in table["Routes"] if route.get("DestinationCidrBlock") == "0.0.0.0/0"]
    if any(route.get("GatewayId", "").startswith("igw-") for route in defaults):
        raise UserError(
            f"--subnet: {subnet} routes to an internet gateway, which nodes without public addresses cannot use. "
            "Give a subnet that routes to a NAT gateway."
        )
    if not any(route["State"] == "active" for route in defaults):
        missing = [name for name in ("s3", *services) if name not in endpoints]
        if missing:
            raise UserError(
                f"--subnet: {subnet} has no working route to a NAT gateway, and its VPC no endpoint for "
                f"{', '.join(missing)}, so nodes would not start. Add either."
            )
    elif "s3" not in endpoints:
        return (
            f"{subnet} has no gateway endpoint for S3, which is free: all photos would pass the NAT gateway, for 0.045 "
            f"dollars per GB. Add one: aws ec2 create-vpc-endpoint --vpc-id {vpc} --route-table-ids "
            f"{table['RouteTableId']} --service-name com.amazonaws.{ec2.meta.region_name}.s3"
        )
    return ""


def _route_table(ec2: Any, vpc: str, subnet: str) -> Values:
    """Return the route table of a subnet: its own or the VPC's main one."""
    tables: list[Values] = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"]
    own = (table for table in tables if any(each.get("SubnetId") == subnet for each in table["Associations"]))
    main = (table for table in tables if any(each.get("Main") for each in table["Associations"]))
    return next(own, None) or next(main)


def _endpoints(ec2: Any, vpc: str, table: str) -> set[str]:
    """Return the services of AWS with an endpoint that nodes can use; S3's gateway is one of a route table."""
    described = ec2.describe_vpc_endpoints(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["VpcEndpoints"]
    usable = (
        each
        for each in described
        if each["State"].lower() == "available"
        and (each.get("VpcEndpointType") == "Interface" or table in each["RouteTableIds"])
    )
    return {each["ServiceName"].split(".", 3)[3] for each in usable}  # com.amazonaws.us-east-1.ecr.api


def find_groups(ec2: Any, cluster: str, vpc: str | None = None) -> list[str]:
    """Return the ids of the cluster's security groups: that of a VPC, or those of all VPCs of the region."""
    filters = [{"Name": "group-name", "Values": [cluster]}]
    filters += [{"Name": "description", "Values": [_group_text(cluster)]}, {"Name": "vpc-id", "Values": [vpc or "*"]}]
    return [group["GroupId"] for group in ec2.describe_security_groups(Filters=filters)["SecurityGroups"]]


def _group_text(cluster: str) -> str:
    """Return the description by which a security group is known as the cluster's, besides its name."""
    return f"Ray cluster {cluster}"


def create_group(ec2: Any, vpc: str, cluster: str) -> str:
    """Return the id of a security group that allows connections between its members only; create what is missing."""
    group = next(iter(find_groups(ec2, cluster, vpc)), None)
    if group is None:
        created = ec2.create_security_group(GroupName=cluster, Description=_group_text(cluster), VpcId=vpc)
        group = str(created["GroupId"])
    rule = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    try:  # also for an existing group: an earlier run may have ended before it had the rule
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
    except ec2.exceptions.ClientError as error:
        if error.response["Error"]["Code"] != "InvalidPermission.Duplicate":
            raise
    return group
